import sys
from pathlib import Path
from tiny_wan_clips import record
if __name__=="__main__":
    record(Path("runs/tiny-wan/clips"),3,0,lambda s: print(s,flush=True))
