"""The figure of the page that can be hovered, and the budgets to choose from: their data."""
