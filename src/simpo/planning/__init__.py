"""What a training run will take, before anything is loaded: memory, time and cost."""
