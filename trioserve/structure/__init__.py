"""What every task obeys: deadlines, drain, the error boundary, and the two records handed down the tree."""
