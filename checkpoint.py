def load_config(path): raise NotImplementedError
