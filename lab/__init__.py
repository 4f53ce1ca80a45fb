"""The paper's measurements, each a module and a command."""
