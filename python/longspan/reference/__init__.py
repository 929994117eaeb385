"""The obvious, slow version of every operator in plain torch.

Oracle of the tests, and path of the devices that have no kernels yet.
"""
