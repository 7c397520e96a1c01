"""What a biologist calls: one file for each task, none imports another."""
