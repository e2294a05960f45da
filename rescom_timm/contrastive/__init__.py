"""The contrastive part of ResCom: pairs, queues and losses. Imports torch only, so any training loop can use it."""
