"""The types of a config's fields: what pydantic checks a value against, and what a message tells the user to give."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(strict=True, ge=1, description="a whole number of 1 or more")]
Whole = Annotated[int, Field(strict=True, ge=0, description="a whole number of 0 or more")]
Threads = Annotated[int, Field(strict=True, ge=1, le=256, description="a whole number from 1 to 256")]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False, description="a number above 0")]
Width = Annotated[Count | Positive, Field(description="channels, or a share such as 0.25")]
NotNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False, description="a number of 0 or more")]
Share = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False, description="a number from 0 to 1")]
Below1 = Annotated[
    float, Field(strict=True, ge=0, lt=1, allow_inf_nan=False, description="a number from 0 up to, not including, 1")
]
Switch = Annotated[bool, Field(strict=True, description="true or false")]
Text = Annotated[
    str,
    Field(strict=True, pattern=r"^[^\x00-\x1f\x7f]+$", max_length=4096, description="text in quotes, on one line"),
]
Name = Annotated[
    str,
    Field(
        strict=True,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="up to 64 letters, digits, '.', '_' and '-', the first a letter or digit",
    ),
]
Factory = Annotated[
    str,
    Field(
        strict=True,
        pattern=r"^(timm:[\w.]+|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*)$",
        description='package.module:factory or timm:name, such as "hwsearch.models.vgg:vgg_small"',
    ),
]
OwnCode = Annotated[
    str,
    Field(
        strict=True,
        pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$",
        description='module:name of your own code, such as "my_data:make"',
    ),
]
Shape = Annotated[
    str,
    Field(
        strict=True, pattern=r"^[1-9]\d{0,6}(x[1-9]\d{0,6})+$", description='sizes joined by x, such as "1x3x224x224"'
    ),
]
Percent = Annotated[
    str,
    Field(
        strict=True,
        pattern=r"^\d{1,3}(\.\d+)?\s*%$",
        description='a share of the full network\'s measured ms, such as "50%", or set budget_ms',
    ),
]
Ms = Annotated[
    float, Field(strict=True, gt=0, allow_inf_nan=False, description="a number of milliseconds above 0, such as 3.0")
]
Quantile = Annotated[float, Field(strict=True, ge=0.5, lt=1, description="a number from 0.5 up to, not including, 1")]
