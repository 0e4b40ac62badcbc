"""The scores inside other pruning toolkits: `torch_pruning` and `prune` (of torch.nn.utils). docs/embedding.md.

Nothing is imported here: each module needs its toolkit, and only when it is imported itself.
"""
