"""Sharing: a trained run as a plain timm model, on the Hub, and its predictions."""
