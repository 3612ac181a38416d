"""Callbacks that track EMAs in other libraries' training loops; each imports its library."""
