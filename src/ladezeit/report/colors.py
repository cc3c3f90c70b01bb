"""The colors of all pictures and charts: color-blind safe (Okabe and Ito), told apart in gray print too."""

BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
PINK = "#CC79A7"
SKY = "#56B4E9"
VERMILION = "#D55E00"
FOREST = "#117733"
GRAY = "#999999"
INDIGO = "#332288"
WINE = "#882255"

#: In the order in which they are given to things that have to be told apart.
COLORS = (BLUE, ORANGE, GREEN, PINK, SKY, VERMILION, FOREST, GRAY, INDIGO, WINE)

#: What nothing accounts for.
REST = "#BBBBBB"
