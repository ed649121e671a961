"""Exit codes of the command-line programs."""

FAILED = 1  # the same command may succeed
USER_ERROR = 2  # a user's mistake, which launchers do not retry
STOPPED = {"SIGINT": 130, "SIGTERM": 143}  # as a shell reports them
