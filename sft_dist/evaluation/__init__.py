"""What the model that is being trained says and how well it predicts, under every strategy."""
