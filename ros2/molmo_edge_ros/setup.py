from setuptools import setup

name = "molmo_edge_ros"
setup(
    name=name,
    version="0.1.0",
    packages=[name],
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{name}"]),
        (f"share/{name}", ["package.xml"]),
        (f"share/{name}/launch", ["launch/molmo_edge.launch.py"]),
    ],
    zip_safe=True,
    license="Apache-2.0",
    description="A lifecycle node that asks a Molmo model about the newest image.",
    entry_points={"console_scripts": [f"molmo_edge = {name}.node:main"]},
)
