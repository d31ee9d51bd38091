"""What one step is made of: objective, optimizer, evaluation, checkpoint, processes, guards."""
