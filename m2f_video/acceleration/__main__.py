"""Write the digests of the functions that twins are written for, after their source has changed.

Run the tests of the twins first (`tests/acceleration`): they say whether the twins still do what these functions say.
"""

import json

from m2f_video.acceleration import written_for
from m2f_video.acceleration.twins import WRITTEN
from m2f_video.files import atomic_path

if __name__ == "__main__":
    digests = written_for.digests(function for twin in WRITTEN for function in twin.functions())
    with atomic_path(written_for.FILE) as file:
        file.write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")
    print(f"{len(digests)} functions: {written_for.FILE}")
