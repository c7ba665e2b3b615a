"""`fastvit finetune`: options, data, model, Trainer, files."""
