"""What every method ends in: members and the classifier."""
