"""The same, faster: each function has a slow twin in attention.py, model.py or torch, and a test
that holds it to that. Skip this folder at first. It imports nothing of ours."""
