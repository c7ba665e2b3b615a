"""Files of weights and configs: reading, checking, converting. Nothing here builds a model."""
