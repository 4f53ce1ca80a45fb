"""The lab's commands: what they compute from made-up input, and their one-line errors."""

import json

import pytest

from attention import visible_pairs
from lab import cost, curves, table

SIZES = {"n_layer": 4, "n_head": 2, "n_kv_head": 1, "d_model": 16, "d_ff": 16, "vocab_size": 32, "window": 8}


def test_cost_is_what_arithmetic_promises():
    """Cache bytes and pairs are exact; times are only there and positive (what they are is the machine's affair)."""
    costs = {pattern: cost.measure(pattern, 64, SIZES, "cpu", repeats=1) for pattern in ("R", "RN", "rrrN")}
    hybrid, full = costs["rrrN"], costs["R"]
    held = 64 + cost.DECODED + 1  # the cache also holds what is decoded
    assert full.cache_bytes == 4 * held * 8 * 2 * 4 + 8 * held  # rows x head width x (k, v) x float32, and a position each
    assert hybrid.cache_bytes == (held + 3 * 8) * 8 * 2 * 4 + 8 * (held + 8)
    assert hybrid.cache_promised == pytest.approx((1 + 3 * 8 / 64) / 4) and full.cache_promised == costs["RN"].cache_promised == 1
    assert hybrid.pairs_promised == pytest.approx((visible_pairs(64) + 3 * visible_pairs(64, 8)) / (4 * visible_pairs(64)))
    assert all(min(c.decode_ms, c.prefill_ms, c.train_ms) > 0 for c in costs.values())
    lines = cost.table(list(costs.values())).splitlines()
    assert len(lines) == 4 and f"{hybrid.cache_bytes / full.cache_bytes:.3f}" in lines[3]


def write_run(folder, pattern, exact, seed=1):
    """A finished run's record."""
    folder.mkdir()
    recipe = {"seed": seed, "model": {"pattern": pattern, "qk_norm": pattern == "R"}, "phase": [{"steps": 2, "lengths": {"512": 1}}]}
    record = {"arguments": ["--pattern", pattern, "--out", "x y"], "recipe": recipe, "corpus": "c0", "python": "3", "torch": "2", "device": "cpu", "threads": 1}
    (folder / "run.json").write_text(json.dumps(record))
    scores = [{"length": n, "questions": 200, "exact": exact, "digits": 1.0, "error": 0.01} for n in (256, 512)]
    entries = [
        {"step": 1, "loss": 3.0, "seconds": 90.0},
        {"step": 2, "loss": 2.0, "seconds": 30.0},
        {"step": 2, "val_loss": 2.5, "val_bits_per_byte": 1.5, "needles": exact},
        {"step": 2, "final": True, "val_loss": 2.5, "val_bits_per_byte": 1.5, "table": scores},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_the_table_of_runs(tmp_path, capsys):
    write_run(tmp_path / "a", "rrrN", 0.95)
    write_run(tmp_path / "b", "R", 0.5)
    table.main([str(tmp_path / "a"), str(tmp_path / "b"), "--title", "T", "--plot", str(tmp_path / "t.png")])
    text = capsys.readouterr().out
    assert text.startswith("# T\n") and "\npython train.py --pattern rrrN\n" in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows[0] == "| `rrrN` | 1 | 2.500 | 1.500 | 0.95 ± 0.01 | 0.95 ± 0.01 | 2.0 |  |"
    assert rows[1].startswith("| `R` QK-Norm |") and rows[1].endswith("not learned in this time |")
    assert (tmp_path / "t.png").read_bytes()[:4] == b"\x89PNG"


def test_curves(tmp_path, capsys):
    write_run(tmp_path / "a", "rrrN", 0.95)
    curves.main([str(tmp_path / "a"), "--out", str(tmp_path / "c.png")])
    assert "needles 0.95" in capsys.readouterr().out and (tmp_path / "c.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "main,argv,word",
    [
        (curves.main, ["nowhere"], "nowhere"),
        (curves.main, ["--outt", "x"], "--out"),
        (table.main, ["nowhere"], "nowhere"),
        (cost.main, ["--patterns", "rx"], "'x'"),
        (cost.main, ["--lengths", "1"], "1"),
        (cost.main, ["--out", "/proc/none/x"], "/proc/none"),
    ],
)
def test_errors_are_one_line(main, argv, word, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(error) == 1 and word in error[0]


def test_an_unfinished_run_is_named(tmp_path, capsys):
    write_run(tmp_path / "a", "rrrN", 0.95)
    log = tmp_path / "a" / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(SystemExit):
        table.main([str(tmp_path / "a")])
    assert "--resume" in capsys.readouterr().err
