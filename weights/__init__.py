"""Where networks come from and go: checkpoints, published files, opening one."""
