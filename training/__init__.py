"""What a run needs round the loop: options, roles, pairs, its folder and log, its cost."""
