"""The command line: `megatron-keye COMMAND`, one module per command."""
