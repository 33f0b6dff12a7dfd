"""The version of jpeft, in a file that imports nothing."""

__version__ = "0.1.0"

# Raised by every change that makes a run with the same config and seed end in other numbers: a run that was started
# before it is not resumed after it. A change that concerns few runs has its number in `jpeft.run.config.results`.
RESULTS = 5
