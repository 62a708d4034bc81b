"""What happens beside the optimizer step: checkpoints, log, validation, pictures, progress. One file each."""
