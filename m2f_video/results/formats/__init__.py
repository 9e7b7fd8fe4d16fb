"""Results in the formats of other programs, written frame by frame and read back: one file per format.

`VideoSegmentation` has a method for each (`to_coco`, `from_coco` and so on), which says what the format holds.
"""
