"""`python -m vembed_async_ckpt`: the command line, as `vembed-ckpt`."""

from .cli import main

if __name__ == "__main__":
    main()
