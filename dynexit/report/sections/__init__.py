"""Parts of the page on single points, methods and trainings."""
