"""Other libraries' attention, called as they are and computed by ours."""
