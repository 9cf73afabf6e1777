"""What a parameter is: dimension numbers, the matrix view, the plan, trees of them."""
