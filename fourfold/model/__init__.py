"""The model: nn.Modules only, no input or output, no torch.distributed. Read ``transformer.py`` first."""
