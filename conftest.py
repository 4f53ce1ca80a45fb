"""Makes the modules of the repository importable from tests/, whichever way pytest is started."""
