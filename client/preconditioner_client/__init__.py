"""Asynchronous Shampoo for a training process: the optimizer and its exchange with the service."""
