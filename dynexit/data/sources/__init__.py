"""Where images come from: torchvision by name, a CSV file of labels, a data set of a Python program."""
