"""Late-phase weights for anyone's training loop: members, selections, averages, merging."""
