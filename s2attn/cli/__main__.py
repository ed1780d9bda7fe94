"""``python -m s2attn.cli``."""

from s2attn.cli import main

if __name__ == "__main__":
    main()
