/**
 * Have a node saved as if a widget among its inputs were not there.
 *
 * The page writes a widget's value at the widget's place, leaves a hole for those that are not saved, and reads the
 * values one behind the other. It also saves the height that the widget takes only while a stream runs.
 *
 * @param node
 * @param {() => number} extraHeight how much the widget is higher now than on a node just opened
 */
export function saveWithout(node, extraHeight) {
  const { onSerialize } = node
  node.onSerialize = function (saved) {
    const result = onSerialize?.call(this, saved)
    // `filter` passes over holes.
    if (saved.widgets_values) saved.widgets_values = saved.widgets_values.filter(() => true)
    saved.size = [saved.size[0], saved.size[1] - extraHeight()]
    return result
  }
}
