"""Commands that look at a run; they answer while the server runs, and never import torch."""
