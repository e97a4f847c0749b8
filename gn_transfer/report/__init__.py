"""What runs left behind: reading their folders, and the page of one run. Imports no torch."""
