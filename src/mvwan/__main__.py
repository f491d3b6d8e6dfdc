"""`python -m mvwan` is `mvwan`."""

from mvwan.cli import main

if __name__ == "__main__":
    main()
