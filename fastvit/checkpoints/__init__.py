"""Reads, validates and converts files of weights and configs, without building a model."""
