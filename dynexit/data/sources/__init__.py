"""Where images come from: torchvision, CSV labels, a Python program; and what is kept of folders between jobs."""
