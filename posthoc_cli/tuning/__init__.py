"""The loop around synthesis: which average a metric of one's own likes best."""
