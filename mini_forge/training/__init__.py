"""Losses, optimizers, schedules, and the loop that turns batches into an adapter."""
