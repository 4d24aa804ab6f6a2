"""``mxq explore``: a page on this machine that solves the plan of a work folder for any budget."""
