"""The time of a step, predicted from the account of its work and a table of measured rates."""
