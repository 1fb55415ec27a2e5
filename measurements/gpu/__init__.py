"""What only a machine with a GPU can say; ``run.sh`` runs all of it there, without a network."""
