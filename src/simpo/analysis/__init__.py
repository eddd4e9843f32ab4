"""What a run was: figures from what it left in its folder."""
