"""GPT-2 from torch.nn, as nanoGPT trains it (no biases, exact GELU, a vocabulary padded to 50,304):
the peer of lab.speed."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attention import visible_pairs


class Block(nn.Module):
    """x + attention(LN(x)), then x + feed-forward(LN(x))."""

    def __init__(self, d_model: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(d_model, bias=False), nn.LayerNorm(d_model, bias=False)
        self.c_attn = nn.Linear(d_model, 3 * d_model, bias=False)
        self.attn_proj = nn.Linear(d_model, d_model, bias=False)
        self.c_fc = nn.Linear(d_model, 4 * d_model, bias=False)
        self.mlp_proj = nn.Linear(4 * d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (b t c) -> (b t c)."""
        qkv = self.c_attn(self.ln_1(x))
        q, k, v = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=self.n_head)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(rearrange(y, "b h t d -> b t (h d)"))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


class GPT2(nn.Module):
    """Learned positions up to `length`, full causal attention, tied embeddings."""

    def __init__(self, n_layer=12, n_head=12, d_model=768, vocab_size=50304, length=1024):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, d_model), nn.Embedding(length, d_model)
        self.layers = nn.ModuleList(Block(d_model, n_head) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(d_model, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (b t v) of tokens (b t)."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.layers:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)

    def matmul_parameters(self) -> int:
        """N: the parameters that multiply every token; positions are only added."""
        return sum(p.numel() for p in self.parameters() if p.ndim == 2) - self.wpe.weight.numel()

    def flops_per_token(self, length: int) -> float:
        """Training FLOPs of a token, as Transformer.flops_per_token counts them."""
        attention = 12 * self.wte.embedding_dim * len(self.layers) * visible_pairs(length) / length
        return 6 * self.matmul_parameters() + attention
