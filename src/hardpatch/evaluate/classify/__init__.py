"""How well features or a fine-tuned encoder tell classes apart."""
