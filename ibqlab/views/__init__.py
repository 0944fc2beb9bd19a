"""What views of a run show, computed once and stored in its folder: no widget, no notebook, only arrays and pages."""
